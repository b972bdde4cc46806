"""The safetensors file of the original notebook, in and out."""
