"""Methods against forgetting, one file a part; `python -m methods` lists them."""
