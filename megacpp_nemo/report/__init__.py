"""A recipe as a picture and as a page: what one looks at before spending a cluster on it.

    picture_of(recipe("nam56r"))       # one description of the layers, drawn as SVG, PNG, text
    page(recipe("nam56r"))             # one HTML file with everything that is known of it

Pages and pictures need nothing from the network, and nothing to run the model.
"""
