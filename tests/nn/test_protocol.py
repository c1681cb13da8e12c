"""What the library asks of an elastic model is what it has."""

from nn.models import small_model
from nn.test_elastic_model import elastic

from flextron.nn import Elastic


def test_an_elastic_model_has_every_member_of_the_protocol_and_a_stock_model_has_not():
    assert isinstance(elastic(), Elastic)
    assert not isinstance(small_model(), Elastic)
