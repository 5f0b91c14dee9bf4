"""The engine: a plain synchronous object that batches requests continuously. No web, no metrics, no transformers."""
