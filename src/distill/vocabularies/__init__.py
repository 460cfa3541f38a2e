"""Two tokenizers over one text: what their tokens are as bytes, where they meet, and how ids go from one to the other.

Bytes are the common ground. Nothing here knows a model: a batch's alignment is made where batches are made.
"""
