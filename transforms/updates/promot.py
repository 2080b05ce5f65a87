"""ProMoT: a soft prompt is trained first, then the model with the prompt attached."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradlab.transforms._common import as_key, concrete
from gradlab.transforms.updates import _common as common
from gradlab.types import method


def attach_prompt(
  prompt: jax.Array, embeddings: jax.Array, *, max_length: int | None = None
) -> jax.Array:
  """The soft prompt in front of the embedded sequence.

  Args:
    prompt: [k, d], or [..., k, d] for a prompt per example (``prompts[task_id]``);
      float32, cast to the dtype of the embeddings.
    embeddings: [..., T, d].
    max_length: length of the positional table, where the model has one. The prompt
      takes the first k positions and shifts the others.

  Returns:
    [..., k + T, d] in the dtype of the embeddings.

  Raises:
    ValueError: features that do not agree, or a sequence longer than ``max_length``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import attach_prompt
    >>> attach_prompt(jnp.ones((3, 4)), jnp.zeros((2, 5, 4))).shape
    (2, 8, 4)
  """
  if prompt.ndim < 2 or prompt.shape[-1] != embeddings.shape[-1]:
    raise ValueError(
      f"a prompt [..., k, {embeddings.shape[-1]}] fits embeddings "
      f"{embeddings.shape}, got {prompt.shape}."
    )
  length = prompt.shape[-2] + embeddings.shape[-2]
  if max_length is not None and length > max_length:
    raise ValueError(
      f"prompt and sequence have {length} positions together, more than the "
      f"{max_length} of max_length."
    )
  if prompt.ndim == 2:
    lead = (1,) * (embeddings.ndim - 2)
    prompt = prompt.reshape(*lead, *prompt.shape)
  shape = (*embeddings.shape[:-2], *prompt.shape[-2:])
  spread = jnp.broadcast_to(prompt.astype(embeddings.dtype), shape)
  return jnp.concatenate([spread, embeddings], axis=-2)


def prompt_mask(mask: jax.Array, k: int) -> jax.Array:
  """The mask of valid positions once a prompt of k tokens stands in front.

  Args:
    mask: [..., T], bool or of any other dtype with 1 for valid.
    k: length of the prompt, 0 or more.

  Returns:
    [..., k + T], same dtype.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradlab.transforms.updates import prompt_mask
    >>> prompt_mask(jnp.array([1, 0]), 2).tolist()
    [1, 1, 1, 0]
  """
  front = jnp.ones((*mask.shape[:-1], k), mask.dtype)
  return jnp.concatenate([front, mask], axis=-1)


def init_prompt(
  key: int | jax.Array,
  num_tokens: int,
  dim: int,
  vocab_embeddings: jax.Array | None = None,
  scale: float = 0.5,
) -> jax.Array:
  """A fresh soft prompt: random rows of the embedding table, or uniform numbers.

  Args:
    key: a jax key or an int.
    num_tokens: length k of the prompt, 0 or more.
    dim: features d of the embeddings.
    vocab_embeddings: [V, d], the table to draw rows from, without replacement where
      it has k of them; None draws uniform numbers.
    scale: they lie in [-scale, scale).

  Returns:
    [k, d] float32.

  Raises:
    ValueError: ``num_tokens`` below 0, or a table without ``dim`` features.

  Examples:
    >>> from gradlab.transforms.updates import init_prompt
    >>> init_prompt(0, num_tokens=4, dim=8).shape
    (4, 8)
  """
  key = as_key(key)
  if num_tokens < 0:
    raise ValueError(f"num_tokens must be 0 or more, got {num_tokens}.")
  if vocab_embeddings is None:
    uniform = jax.random.uniform(key, (num_tokens, dim), jnp.float32, -1.0, 1.0)
    return uniform * jnp.asarray(scale, jnp.float32)
  rows, features = vocab_embeddings.shape
  if features != dim:
    raise ValueError(f"vocab_embeddings has {features} features, dim is {dim}.")
  drawn = jax.random.choice(key, rows, (num_tokens,), replace=num_tokens > rows)
  return jnp.asarray(vocab_embeddings)[drawn].astype(jnp.float32)


def _labels(is_prompt: Any) -> Callable[[Any], Any]:
  """``params -> labels`` for ``optax.partition``, checked."""

  def name(flag: Any) -> str:
    return "prompt" if flag else "model"

  def labels(params: Any) -> Any:
    if not jax.tree.leaves(
      params
    ):  # nothing to tell apart, as in optax.tree.map_params
      return params
    if callable(is_prompt):
      found = jax.tree_util.tree_map_with_path(
        lambda path, leaf: name(is_prompt(path, leaf)), params
      )
    else:
      found = jax.tree.map(
        lambda flag, below: jax.tree.map(lambda _: name(flag), below),
        is_prompt,
        params,
      )
    kinds = set(jax.tree.leaves(found))
    if len(kinds) != 2:
      raise ValueError(
        "is_prompt must select some leaves as the prompt and leave some to the model, "
        f"got {'all' if kinds == {'prompt'} else 'no'} leaves as the prompt."
      )
    return found

  return labels


@method(
  family="updates",
  paper="Wang et al., Two-stage LLM Fine-tuning with Less Specialization and More "
  "Generalization, 2024",
  arxiv="2211.00635",
  seeds=("001:33",),
)
def promot(
  prompt_tx: optax.GradientTransformation,
  model_tx: optax.GradientTransformation,
  num_prompt_steps: int | jax.Array,
  is_prompt: Any,
) -> optax.GradientTransformationExtraArgs:
  r"""ProMoT: prompt tuning for some steps, then fine-tuning with the prompt frozen.

  .. math::
    P_{s+1} &= P_s + \text{prompt\_tx}(\nabla_P L), \quad
    \theta_{s+1} = \theta_s \quad (s < N_1) \\
    \theta_{s+1} &= \theta_s + \text{model\_tx}(\nabla_\theta L), \quad
    P_{s+1} = P_s \quad (s \ge N_1)

  The loss is that of the model on ``attach_prompt(P, E(x))`` in both stages. What
  rests gets a zero update whatever its gradient, NaN included, and its transformation
  keeps its state: ``model_tx`` starts fresh at step N_1, its counters, bias
  corrections and schedules at 0. For any other task the model is used without P.

  This is ``optax.partition`` over two ``optax.conditionally_mask``, with float32
  states. They count their own calls: put ``optax.MultiSteps`` outside. A config names
  update rules in the places of ``prompt_tx`` and ``model_tx``, and a mapping from
  branches of params to bools as ``is_prompt``. The states of both exist for the whole
  run, and both gradients are computed: differentiate by the prompt alone in a stage of
  its own where that matters.

  Args:
    prompt_tx: updates the prompt; its rate is large, 0.1 to 0.5.
    model_tx: updates the model.
    num_prompt_steps: N_1 >= 0, steps of the first stage; an int or an int array, which
      may be traced. 0 fine-tunes with a fixed random prompt.
    is_prompt: bools as a prefix tree of params, or ``is_prompt(path, leaf) -> bool``
      with paths as ``jax.tree_util.tree_map_with_path`` gives them.

  Returns:
    A transformation with the state of ``optax.partition``.

  Raises:
    ValueError: ``num_prompt_steps`` that is no integer or below 0; by ``init`` and
      ``update``, no leaf or all leaves selected as the prompt.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from gradlab.transforms.updates import promot
    >>> transform = promot(optax.sgd(0.5), optax.sgd(0.5), 2, {"p": True, "w": False})
    >>> params = {"p": jnp.array(0.0), "w": jnp.array(0.0)}
    >>> state = transform.init(params)
    >>> loss = lambda params: 0.5 * (params["p"] + params["w"] - 3.0) ** 2
    >>> for _ in range(4):
    ...   updates, state = transform.update(jax.grad(loss)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> params["p"].item(), params["w"].item()
    (2.25, 0.5625)

  References:
    Wang et al., `Two-stage LLM Fine-tuning with Less Specialization and More
    Generalization <https://arxiv.org/abs/2211.00635>`_, 2024
  """
  if concrete(num_prompt_steps):
    steps = np.asarray(num_prompt_steps)
    if not np.issubdtype(steps.dtype, np.integer) or (steps < 0).any():
      raise ValueError(
        f"num_prompt_steps must be an integer of at least 0, got {num_prompt_steps!r}."
      )
  switch = jnp.asarray(num_prompt_steps, jnp.int32)
  stages = {
    "prompt": optax.conditionally_mask(
      common.in_float32(prompt_tx), lambda step: step < switch
    ),
    "model": optax.conditionally_mask(
      common.in_float32(model_tx), lambda step: step >= switch
    ),
  }
  return optax.partition(stages, _labels(is_prompt))
