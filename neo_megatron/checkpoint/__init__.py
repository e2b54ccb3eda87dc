"""Checkpoints: conversion between Hugging Face's form and Megatron's, initialization, and verification."""
