"""Message passing without a tensor of one row an edge: nodes are gathered only where somebody needs the result.

- `deferred`: a gather that has not been made, as a tensor
- `patterns`: what such a tensor is made of
- `functions`: what is done with one: its shape is known, operations are recorded; all else makes it
- `reductions`: what the messages of a node are reduced to
- `sums`: the sums over edges, and their gradients
- `extremes`: the maxima and minima over edges, and their gradients
- `programs`: operations on each edge that are noted, such as those of a network that makes messages
- `chunks`: what computes these, some thousand edges at a time
- `scores`: the scores of edges of which attention is made
- `rules`: what each reduction books, and whom it calls
- `plan`: a graph's edges in the order of their targets, and of their sources
"""
