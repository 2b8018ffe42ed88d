"""Read GGUF files written by llama.cpp, without torch: architecture, weights and tokenizer from one file.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from .architectures import config, tensors
from .file import all_files, is_gguf
from .tokenizers import stop_tokens, tokenizer

__all__ = ["all_files", "config", "is_gguf", "stop_tokens", "tensors", "tokenizer"]
