"""What ``gradlab.launch.bench`` measures."""
