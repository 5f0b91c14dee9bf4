"""HTTP over LitServe: routes and supervision in the API process, the engine's loop in the worker process."""
