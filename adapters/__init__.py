"""What an adapter is, where it lives and how it reaches the device. Imports neither the server nor the trainer."""
