"""Models whose image stands in no sequence of the decoder: attention reads it from a context beside.

Cross-attention to an encoder, resamplers with learned queries, an image in front of the text. The method is the same;
what is particular to them is here, a file each:

* ``beside``: the route, from a call to the modules that read, and what they are given when the model is shown a tile;
* ``sites``: which attention modules these are; ``own_code``: those that compute without the AttentionInterface;
* ``readers``: words or learned queries, whose call it is;
* ``carriers``: how the call reaches modules to which a model hands no keyword arguments;
* ``pictures``, ``flattened_patches``: the kinds of views; ``arrangements``: how pictures lie in a batch.
"""
