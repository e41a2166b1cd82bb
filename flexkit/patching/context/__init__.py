"""Models whose image stands in no sequence of the decoder: attention reads it from a context beside.

Cross-attention to an encoder, resamplers with learned queries, an image in front of the text. The method is the same;
what is particular to them is here, a file each:

* ``sites``: which attention modules read the image;
* ``pictures``, ``patches``, ``page``: the kinds of views; ``arrangements``: how pictures lie in a batch;
* ``show``: high-res features are what the first of these modules is given when the model is shown a tile;
* ``readers``: words or learned queries, whose call it is; ``generate``: reading before a generation begins;
* ``carriers``: how the call reaches modules to which a model hands no keyword arguments;
* ``own_code``: attention that is computed without transformers' AttentionInterface;
* ``families``: one line a model type.
"""
