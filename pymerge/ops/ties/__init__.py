"""The ops `ties` and `select`: validate, choose the backend, call."""
