"""An SGLang worker in a role, and the launcher of a cluster of them."""
