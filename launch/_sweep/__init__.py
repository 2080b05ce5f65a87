"""What ``gradlab.launch.sweep`` plans, runs and shows."""
