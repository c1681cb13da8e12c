"""Axes are data: what is told of each of them is told in their order, and comes back as it went."""

import dataclasses

import pytest

from flextron.config import AXES, MENUS, ElasticConfig, PerAxis, Widths
from flextron.scale.shapes import SHAPES

CONFIG = dataclasses.replace(SHAPES["1b"], num_layers=2)


def test_axes_are_the_fields_that_widths_and_files_have():
    assert tuple(f.name for f in dataclasses.fields(Widths)) == AXES
    assert set(MENUS) <= {f.name for f in dataclasses.fields(ElasticConfig)}
    assert [(axis.name, axis.menu) for axis in CONFIG.axes] == [
        ("mlp", CONFIG.mlp_choices),
        ("heads", CONFIG.head_choices),
    ]


def test_places_in_the_menus_and_widths_are_the_same_thing():
    places = PerAxis(mlp=(0, 3), heads=(2, 1))
    widths = CONFIG.widths(places)
    assert widths == Widths(mlp=(2048, 8192), heads=(6, 4))
    assert CONFIG.indices(widths) == places
    assert widths.to_dict() == {"mlp": [2048, 8192], "heads": [6, 4]}


def test_the_largest_of_several_covers_each_of_them():
    a, b = Widths((1, 4), (2, 2)), Widths((3, 2), (1, 2))
    assert Widths.largest([a, b]) == Widths((3, 4), (2, 2))
    assert not a.covers(b)
    assert not a.covers(Widths((1,), (2,)))


@pytest.mark.parametrize("axis", AXES)
def test_a_width_that_no_menu_has_is_refused_by_its_axis(axis):
    wrong = dataclasses.replace(CONFIG.full(), **{axis: (1, 7)})
    with pytest.raises(ValueError, match=rf"^widths: {axis}\[[01]\] must be one of \["):
        CONFIG.check(wrong)
