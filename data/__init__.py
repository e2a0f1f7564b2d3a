"""From raw files to batches: official question files, words, answers, images, the h5 store and its loader.

Nothing here knows a model or a setting: functions take plain named arguments.
"""
