"""Known trees, and that every leaf proves while nothing else does."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.wire import merkle

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "merkle.json").read_text())

# The tree that RFC 6962 implementations test with (google/certificate-transparency, merkletree tests).
CT_LEAVES = [
    bytes.fromhex(leaf)
    for leaf in (
        "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
    )
]  # fmt: skip
CT_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
leaves = st.lists(st.binary(max_size=8), min_size=1, max_size=40)


@pytest.mark.parametrize("count", range(9))
def test_roots_of_the_certificate_transparency_tree(count: int) -> None:
    assert merkle.root(CT_LEAVES[:count]).hex() == CT_ROOTS[count]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["count"]))
def test_agrees_with_the_independent_implementation(vector: dict[str, Any]) -> None:
    tree = merkle.Tree(str(index).encode() for index in range(vector["count"]))
    assert tree.root.hex() == vector["root"]
    for index, path in vector["paths"].items():
        assert [node.hex() for node in tree.path(int(index))] == path


@given(leaves)
def test_every_leaf_proves(data: list[bytes]) -> None:
    tree = merkle.Tree(data)
    for index, leaf in enumerate(data):
        assert merkle.verify_inclusion(tree.root, len(data), index, leaf, tree.path(index))


@given(leaves, st.data())
def test_no_leaf_proves_at_another_index(data: list[bytes], draw: st.DataObject) -> None:
    data = [bytes([index]) + leaf for index, leaf in enumerate(data)]  # all different
    tree = merkle.Tree(data)
    index = draw.draw(st.integers(0, len(data) - 1))
    for other in range(-1, len(data) + 2):
        proves = merkle.verify_inclusion(tree.root, len(data), other, data[index], tree.path(index))
        assert proves == (other == index)


@given(leaves, st.data())
def test_nothing_changed_proves(data: list[bytes], draw: st.DataObject) -> None:
    tree, index = merkle.Tree(data), draw.draw(st.integers(0, len(data) - 1))
    leaf, path = data[index], tree.path(index)
    assert not merkle.verify_inclusion(tree.root, len(data), index, leaf + b"x", path)
    assert not merkle.verify_inclusion(bytes(32), len(data), index, leaf, path)
    assert not merkle.verify_inclusion(tree.root, len(data), index, leaf, (*path, bytes(32)))
    assert not merkle.verify_inclusion(tree.root, len(data), index, leaf, [bytes(32)] * 10_000)
    for step in range(len(path)):
        assert not merkle.verify_inclusion(tree.root, len(data), index, leaf, path[:step] + path[step + 1 :])
        changed = (*path[:step], path[step][:-1], *path[step + 1 :])
        assert not merkle.verify_inclusion(tree.root, len(data), index, leaf, changed)


def test_a_node_is_not_a_leaf() -> None:
    left, right = merkle.leaf_hash(b"a"), merkle.leaf_hash(b"b")
    root = merkle.root([b"a", b"b"])
    assert not merkle.verify_inclusion(root, 1, 0, left + right, ())


@given(leaves)
def test_paths_are_logarithmic(data: list[bytes]) -> None:
    tree = merkle.Tree(data)
    assert all(len(tree.path(index)) <= (len(data) - 1).bit_length() for index in range(len(data)))


def test_no_path_to_a_leaf_that_is_not_there() -> None:
    for index in (-1, 3):
        with pytest.raises(IndexError):
            merkle.Tree([b"a", b"b", b"c"]).path(index)
    assert merkle.Tree([]).root == merkle.EMPTY_ROOT
    assert not merkle.verify_inclusion(merkle.EMPTY_ROOT, 0, 0, b"", ())
