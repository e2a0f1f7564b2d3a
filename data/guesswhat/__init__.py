"""GuessWhat?!: a question about one object of an image is answered yes, no or n.a. (de Vries et al., CVPR 2017)."""
