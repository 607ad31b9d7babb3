"""Message passing without a tensor of one row an edge: rows are gathered only if an operation needs that tensor.

- `deferred`: a gather that has not been executed, as a tensor
- `patterns`: the operations on such tensors that Dibit computes without the gather
- `functions`: torch's functions on such a tensor: its shape is known, some are recorded, all others execute the gather
- `reductions`: sums, maxima and minima of messages by target, and attention scores
- `sums`: the sums over edges, and their gradients
- `extremes`: the maxima and minima over edges, and their gradients
- `programs`: recorded operations on each edge, such as those of a network that makes messages
- `chunks`: programs computed some thousand edges at a time
- `scores`: attention scores of edges, and their gradients
- `rules`: for each reduction, its entries in the ledger and the function that computes it
- `plan`: a graph's edges in the order of their targets, and of their sources
"""
