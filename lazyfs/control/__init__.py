"""The control socket: the server and its commands, jobs, and the client that the verbs use."""
