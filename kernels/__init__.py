"""Our own kernels, each beside its torch reference. Imports neither the server nor the trainer."""
