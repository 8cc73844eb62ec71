"""Jobs elsewhere: what `deepfere submit` sends, to where, and how it follows it to its end."""
