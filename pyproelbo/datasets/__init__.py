"""Data as float tensors (N, D): scikit-learn's digits, files, minibatches of them."""

from pyproelbo.datasets.files import Files as Files
from pyproelbo.datasets.loading import Data as Data
from pyproelbo.datasets.loading import digits as digits
from pyproelbo.datasets.loading import load as load
from pyproelbo.datasets.loading import read as read
from pyproelbo.datasets.minibatches import Minibatches as Minibatches
from pyproelbo.datasets.row_files import Columns as Columns
from pyproelbo.datasets.shuffled import Shuffled as Shuffled
