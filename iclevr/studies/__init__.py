"""Studies that need renders of i-CLEVR's scenes, or the rules of its renderer.

`renders.py` scores renders. The others are studies of `trainer evaluate`, with the contract of
`trainer/studies/study.py`.
"""
