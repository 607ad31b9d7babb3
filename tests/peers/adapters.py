"""How each package's models are built and called, in its authors' own way, on small random data."""

from __future__ import annotations

import tempfile
import typing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from tests.peers.compare import Program

Builds = Iterator[tuple[str, Callable[[], Program]]]


def schnetpack() -> Builds:
    """Energies of molecules; of SchNet and PaiNN also with forces, which ask for a gradient in the forward pass."""
    from torch.utils.data import dataloader

    if not hasattr(dataloader, "T_co"):  # a name of older versions of torch
        dataloader.T_co = typing.TypeVar("T_co", covariant=True)  # type: ignore[attr-defined]
    from schnetpack import atomistic, properties, representation
    from schnetpack import nn as layers
    from schnetpack.model import NeuralNetworkPotential

    def molecules() -> dict[str, Tensor]:
        atoms, batch = 60, torch.arange(60) // 10
        position = torch.rand(atoms, 3) * 3
        i, j = torch.nonzero((batch[:, None] == batch) & ~torch.eye(atoms, dtype=torch.bool), as_tuple=True)
        return {
            properties.Z: torch.randint(1, 9, (atoms,)),
            properties.R: position,
            properties.idx_i: i,
            properties.idx_j: j,
            properties.idx_m: batch,
            properties.offsets: torch.zeros(len(i), 3),
            properties.n_atoms: torch.full((6,), 10),
            properties.cell: torch.zeros(6, 3, 3),
            properties.pbc: torch.zeros(18, dtype=torch.bool),
            properties.idx: torch.arange(6),
        }

    def case(kind: str, forces: bool, **kwargs: Any) -> Callable[[], Program]:
        def build() -> Program:
            make = getattr(representation, kind)
            body = make(
                n_atom_basis=32,
                n_interactions=2,
                radial_basis=layers.GaussianRBF(n_rbf=16, cutoff=4.0),
                cutoff_fn=layers.CosineCutoff(4.0),
                **kwargs,
            )
            heads: list[nn.Module] = [atomistic.Atomwise(n_in=32, output_key="energy")]
            if forces:
                heads.append(atomistic.Forces(energy_key="energy", force_key="forces"))
            model = NeuralNetworkPotential(body, [atomistic.PairwiseDistances()], heads)
            batch = molecules()

            def call(model: nn.Module) -> Any:
                out = model({key: value.clone() for key, value in batch.items()})
                return [out[key] for key in sorted(out) if key in ("energy", "forces")]

            return Program(model, call)

        return build

    for kind in ("SchNet", "PaiNN"):
        yield kind, case(kind, False)
    yield "SO3net", case("SO3net", False, lmax=2)
    yield "FieldSchNet", case("FieldSchNet", False)
    for kind in ("SchNet", "PaiNN"):
        yield f"{kind}, forces", case(kind, True)


def chemprop() -> Builds:
    """Message passing over molecules, through the model's forward and its Lightning `training_step`."""
    from chemprop import data
    from chemprop import models as whole
    from chemprop import nn as parts

    smiles = ["CCO", "c1ccccc1O", "CC(=O)NC", "C1CCCCC1N", "CC(C)C(=O)O", "CCN(CC)CC", "O=C(O)c1ccccc1", "CCOC(C)=O"]

    def case(message: type, aggregate: type, head: type, step: bool = False, **kwargs: Any) -> Callable[[], Program]:
        def build() -> Program:
            targets = np.random.default_rng(0).random((8, 1))  # the same as `seed`
            if "Classification" in head.__name__:
                targets = (targets > 0.5).astype(float)
            points = [data.MoleculeDatapoint.from_smi(s, y) for s, y in zip(smiles, targets, strict=True)]
            batch = data.collate_batch([data.MoleculeDataset(points)[i] for i in range(8)])
            mp = message(d_h=48, depth=3, **kwargs)
            model = whole.MPNN(mp, aggregate(), head(input_dim=48), batch_norm=True)
            model.log = lambda *a, **k: None  # there is no trainer
            if step:
                return Program(model, lambda model: model.training_step(batch, 0))
            return Program(model, lambda model: model(batch.bmg, batch.V_d, batch.X_d))

        return build

    mean, norm, attention = parts.MeanAggregation, parts.NormAggregation, parts.AttentiveAggregation
    yield "bonds", case(parts.BondMessagePassing, mean, parts.RegressionFFN)
    yield (
        "bonds, undirected, dropout",
        case(parts.BondMessagePassing, norm, parts.RegressionFFN, undirected=True, dropout=0.2),
    )
    yield "atoms", case(parts.AtomMessagePassing, norm, parts.MveFFN, activation="elu")
    yield (
        "attention",
        case(
            parts.BondMessagePassing,
            lambda: attention(output_size=48),
            parts.BinaryClassificationFFN,  # type: ignore[arg-type]
        ),
    )
    yield "evidential", case(parts.BondMessagePassing, mean, parts.EvidentialFFN)
    yield "training_step", case(parts.BondMessagePassing, mean, parts.RegressionFFN, step=True)
    yield "training_step, classes", case(parts.AtomMessagePassing, mean, parts.BinaryClassificationFFN, step=True)


def pykeen() -> Builds:
    """Knowledge graphs: scores of triples, through methods and not through `forward`."""
    from pykeen import models
    from pykeen.datasets import Nations

    def case(kind: type, method: str, **kwargs: Any) -> Callable[[], Program]:
        def build() -> Program:
            factory = Nations().training
            model = kind(triples_factory=factory, random_seed=0, **kwargs)
            # Sorted by their head: the first ones have a single head, whose batch norm is a division by nothing.
            triples = factory.mapped_triples[:: len(factory.mapped_triples) // 200][:200]

            def call(model: nn.Module) -> Any:
                if method == "score_hrt":
                    return [model.score_hrt(triples), model.collect_regularization_term()]
                return [model.score_t(triples[:64, :2]), model.collect_regularization_term()]

            def reset(model: nn.Module) -> None:
                model.post_parameter_update()

            return Program(model, call, reset)

        return build

    small = {"embedding_dim": 24}
    conve = {**small, "output_channels": 4, "embedding_height": 4, "embedding_width": 6}
    for kind in (
        "TransE",
        "TransH",
        "TransD",
        "DistMult",
        "ComplEx",
        "RotatE",
        "HolE",
        "QuatE",
        "RESCAL",
        "SE",
        "TuckER",
    ):
        if hasattr(models, kind):
            yield kind, case(getattr(models, kind), "score_hrt", **small)
    for kind in (
        "ERMLP",
        "ERMLPE",
        "ProjE",
        "NTN",
        "ConvKB",
        "ConvE",
        "KG2E",
        "MuRE",
        "PairRE",
        "SimplE",
        "BoxE",
        "CrossE",
    ):
        if hasattr(models, kind):
            more = conve if kind == "ConvE" else small
            yield kind, case(getattr(models, kind), "score_hrt", **more)
    for kind in ("DistMult", "ConvE", "ERMLPE", "TuckER"):
        yield f"{kind}, tails", case(getattr(models, kind), "score_t", **(conve if kind == "ConvE" else small))
    yield "RGCN", case(models.RGCN, "score_hrt", embedding_dim=24, num_layers=2)
    yield "CompGCN", case(models.CompGCN, "score_hrt", embedding_dim=24, encoder_kwargs={"num_layers": 2})
    yield "NodePiece", case(models.NodePiece, "score_hrt", embedding_dim=24)


def recbole() -> Builds:
    """Recommenders, through `calculate_loss`."""
    for name, old in {"bool8": np.bool_, "float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}.items():
        if not hasattr(np, name):  # names of older versions of NumPy
            setattr(np, name, old)
    if not hasattr(scipy.sparse.dok_matrix, "_update"):  # a method of older versions of SciPy
        scipy.sparse.dok_matrix._update = lambda self, entries: self._dict.update(entries)
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, init_seed

    def case(name: str, **settings: Any) -> Callable[[], Program]:
        def build() -> Program:
            folder = tempfile.mkdtemp()
            given = {
                "train_batch_size": 256,
                "use_gpu": False,
                "checkpoint_dir": folder,
                "show_progress": False,
                "embedding_size": 32,
                "state": "ERROR",
                "log_wandb": False,
                "seed": 0,
                "reproducibility": True,
                **settings,
            }
            config = Config(model=name, dataset="ml-100k", config_dict=given)
            init_seed(0, True)
            torch.use_deterministic_algorithms(False)
            data, _, _ = data_preparation(config, create_dataset(config))
            batch = next(iter(data))
            model = get_model(name)(config, data._dataset)
            return Program(model, lambda model: model.calculate_loss(batch))

        return build

    for name in ("BPR", "LightGCN", "NGCF", "NeuMF", "GCMC", "SpectralCF", "DGCF", "SGL", "NCL", "SimpleX", "ENMF"):
        more = {"train_neg_sample_args": None} if name in ("SimpleX",) else {}
        yield name, case(name, **more)
    for name in ("MultiVAE", "MultiDAE", "MacridVAE", "RecVAE", "CDAE"):
        yield name, case(name, train_neg_sample_args=None)
    for name in ("GRU4Rec", "SASRec", "NARM", "SRGNN", "BERT4Rec", "Caser", "NextItNet", "STAMP", "GCSAN"):
        yield name, case(name, train_neg_sample_args=None, loss_type="CE", MAX_ITEM_LIST_LENGTH=12, train_batch_size=64)
    for name in ("FM", "DeepFM", "DCN", "xDeepFM", "AutoInt", "AFM", "WideDeep", "PNN"):
        yield name, case(name, load_col={"inter": ["user_id", "item_id", "rating"]}, threshold={"rating": 3})
