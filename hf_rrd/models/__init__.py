"""What is asked of a transformers model: its body, its embedding, its head, and its teacher."""
