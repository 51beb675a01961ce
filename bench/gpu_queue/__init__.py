"""The queue of one GPU, simulated: the server's own scheduler beside what others do."""
