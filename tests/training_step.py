"""A training step of a network, what it keeps for the way back, and what torch.compile sees."""

import torch


def training_step(net, inputs, train=True):
    """(output, {name: gradient}, bytes kept for backward but for weights); dropout is seeded.

    train=False takes the step in eval mode. Frozen weights have no gradient.
    """
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    net.zero_grad()
    torch.manual_seed(3)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net.train(train)(*inputs)
    size = sum(nbytes for pointer, nbytes in kept.items() if pointer not in weights)
    out.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}
    return out, grads, size


def compiled(net):
    """(the network compiled, a list that gets each graph found in it); the graphs run as they are.

    It raises where the network is not one graph.
    """
    graphs = []

    def as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return torch.compile(net, fullgraph=True, backend=as_it_is), graphs
