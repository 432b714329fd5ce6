"""The OpenAI-compatible front: render, match, choose a pair, relay. Imports neither torch nor SGLang."""
