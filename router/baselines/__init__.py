"""Policies of other routers, and simple ones, behind our protocol: for comparison, and to run in the shadow of ours."""
