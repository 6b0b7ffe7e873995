"""Parts of methods.py: the tasks, the adapters, the training that all share, and what is made of the results."""
