"""KV pages, and moving them between processes. Knows no SGLang and no HTTP."""
