"""Self-training with look-ahead in float64, loop by loop; one array of parameters."""

import copy

import numpy as np


class Sgd:
  """theta -= rate * trace; ``state`` is the trace."""

  def __init__(self, rate, momentum=0.0):
    self.rate, self.momentum, self.state = rate, momentum, 0.0

  def step(self, theta, gradient):
    self.state = gradient + self.momentum * self.state
    return theta - self.rate * self.state


class Adam:
  """Adam with its usual decays."""

  def __init__(self, rate):
    self.rate, self.state = rate, (0, 0.0, 0.0)

  def step(self, theta, g):
    count, m, v = self.state
    count, m, v = count + 1, 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    self.state = count, m, v
    root = np.sqrt(v / (1 - 0.999**count)) + 1e-8
    return theta - self.rate * m / (1 - 0.9**count) / root


def textbook(theta, gradient, batches, optimizer, decay, ahead, mode, commit=False):
  """[(theta, phi) after each iteration]; batches are (batch, future batches)."""
  theta = np.asarray(theta, np.float64)
  phi, out = theta.copy(), []
  for batch, futures in batches:
    saved = copy.deepcopy(optimizer.state)
    if mode == "none":
      phi = decay * phi + (1 - decay) * theta
    elif mode == "deep":
      v = theta
      for _ in range(ahead):
        v = optimizer.step(v, gradient(v, phi, batch))
        phi = decay * phi + (1 - decay) * v
    else:
      students = []
      for future in futures:
        if not commit:
          optimizer.state = copy.deepcopy(saved)
        students.append(optimizer.step(theta, gradient(theta, phi, future)))
      phi = decay * phi + (1 - decay) * np.mean(students, axis=0)
    if not commit:
      optimizer.state = saved
    theta = optimizer.step(theta, gradient(theta, phi, batch))
    out.append((theta, phi))
  return out


class Released:
  """The loop of the segmentation code: one model, one teacher, a pass counter."""

  def __init__(self, theta, gradient, optimizer, decay):
    self.model = np.asarray(theta, np.float64)
    self.teacher = self.model.copy()
    self.gradient, self.optimizer, self.decay = gradient, optimizer, decay
    self.passes = 0

  def train(self, batch):
    gradient = self.gradient(self.model, self.teacher, batch)
    self.model = self.optimizer.step(self.model, gradient)
    self.passes += 1

  def follow(self, target):
    decay = min(1 - 1 / (self.passes + 1), self.decay)
    self.teacher = decay * self.teacher + (1 - decay) * target


def released(theta, gradient, batches, optimizer, decay, ahead, mode, commit=False):
  """As ``textbook``, in the order of the released code."""
  loop, out = Released(theta, gradient, optimizer, decay), []
  for batch, futures in batches:
    start, saved = loop.model.copy(), copy.deepcopy(optimizer.state)
    if not out:
      loop.train(batch)
      loop.follow(loop.model)
    elif mode == "wide":
      total = 0.0
      for future in futures:
        if not commit:
          optimizer.state = copy.deepcopy(saved)
        loop.model = start.copy()
        loop.train(future)
        total = total + loop.model
      loop.follow(total / len(futures))
      loop.model = start
      if not commit:
        optimizer.state = saved
      loop.train(batch)
      loop.follow(loop.model)
    else:
      for _ in range(ahead if mode == "deep" else 0):
        loop.follow(loop.model)
        loop.train(batch)
      loop.follow(loop.model)
      loop.model = start
      if not commit:
        optimizer.state = saved
      loop.train(batch)
    out.append((loop.model, loop.teacher))
  return out
