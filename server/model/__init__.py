"""GPT-2 and its checkpoints. Knows nothing of requests, batches' scheduling or HTTP."""
