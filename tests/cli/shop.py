"""A small shop as a user's files, and settings of a few neurons for it."""

import tiny

N = 10
"""Items of the shop."""
TINY = """
[data]
min_user_interactions = 2
min_item_interactions = 1
[id_model]
d_id = 16
blocks = 1
max_epochs = 2
max_history = 6
[prompt]
layout = "prefix_first"
item_side = "trained"
template = "no_instruction"
max_items = 2
max_item_tokens = 4
[mformer]
experts = 2
queries = 2
blocks = 1
d_model = 16
heads = 2
[head]
whiten_dims = 0
[train]
stage_one_epochs = 1
stage_two_epochs = 1
[backbone]
layers = 2
mean_layers = [1, 3]
precision = "fp32"
name = "{folder}"
[lrurec]
d_id = 16
max_epochs = 2
[llamarec]
candidates = 4
max_history = 2
title_tokens = 4
epoch_examples = 20
[recformer]
d_model = 16
blocks = 1
heads = 2
window = 8
max_items = 2
max_tokens = 32
attribute_tokens = 4
max_epochs = 2
stage_two_epochs = 1
[llm4rec]
max_epochs = 2
[fdsa]
d_model = 16
max_epochs = 2
[zesrec]
d_model = 16
max_epochs = 2
[kar]
d_model = 16
max_epochs = 2
[recguru]
d_model = 16
max_epochs = 2
autoencoder_epochs = 1
"""


def write_raw(folder):
    """orders.csv (customer, sku, timestamp) and goods.csv (sku, title, ...)."""
    orders, goods = tiny.planted_tables(N, users=12)
    orders.rename({"user_id": "customer", "item_id": "sku"}).write_csv(folder / "orders.csv")
    goods.rename({"item_id": "sku"}).write_csv(folder / "goods.csv")
