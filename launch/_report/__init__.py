"""What ``gradlab.launch.report`` reads and draws."""
