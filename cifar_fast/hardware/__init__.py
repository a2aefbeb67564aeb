"""What this machine is and what is fastest on it."""
