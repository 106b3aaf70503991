"""From an image to candidates, and from candidates to labels."""
