"""Pure decisions. Nothing in here imports trio, socket, time or random: time, ids and
randomness are arguments, so that a whole cluster can be simulated in one process."""
