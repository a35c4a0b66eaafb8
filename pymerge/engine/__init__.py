"""Merging model folders (`merge`) and state dicts (`state_dicts`, `state_dict_statistics`): plan,
read ahead, compute, write behind.
"""
