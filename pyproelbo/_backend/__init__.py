"""What torch and Pyro do not promise: named here, and nowhere else."""
