"""What can be seen of a run before it starts: what it reads, computes and needs, and what looks wrong."""
