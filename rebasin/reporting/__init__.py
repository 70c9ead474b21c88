"""What a run leaves for people: pictures, a self-contained HTML page, the terminal's table, a wandb run."""
