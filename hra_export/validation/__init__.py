"""Reference and candidate on the same inputs: PyTorch with live HRA layers, and what is judged."""
