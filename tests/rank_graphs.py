"""The toy run in graphs, on CUDA's stand-in, of ranks that share their gradients."""

from runtime import graphs
from runtime.processes import launch

import sys
from types import SimpleNamespace

import fake_graphs
import pytest
from toy_run import make, train


def main():
    fake_graphs.install(pytest.MonkeyPatch())
    graphs.for_training = graphs.Graphed

    def report(cfg, world):
        run = train(make(sys.argv[1], world=world, graph=True))
        assert type(run.wrapped.ready.module) is graphs.Graphed
        assert [graph.replays for graph in fake_graphs.Graph.made] == [10, 10]

    launch(report, SimpleNamespace(gpus=0))
