"""Going on with a spoken prompt: text until its end, then speech, in one sequence and with one cache."""

import torch


class MelLLMContinuationGenerationMixin:
    """`generate` for a Mel-LLM that goes on with what it hears; see [`MelLLMForSpeechContinuation`]."""

    def _continuation_prompt(self, input_ids, attention_mask, input_features, input_features_mask, task: str):
        """Checked features with their mask, and the prompt with its own: the config's, or the caller's."""
        around = self._prompt_of(task)
        if input_ids is None and input_features_mask is None:
            input_features_mask = attention_mask
        features, mask = self.model._check_features(input_features, input_features_mask)
        features = features.to(self.device)
        mask = None if mask is None else mask.to(self.device)
        if input_ids is None:
            return features, mask, *self._build_prompt(features, mask, around)
        input_ids = input_ids.to(self.device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}. What masks the audio is `input_features_mask`."
            )
        return features, mask, input_ids, attention_mask.to(self.device).long()

    def _prompt_of(self, task: str) -> tuple[list[int], list[int]]:
        prompts = {
            "continuation": (self.config.continuation_prefix_ids, self.config.continuation_suffix_ids),
            "qa": (self.config.qa_prefix_ids, self.config.qa_suffix_ids),
        }
        if task not in prompts:
            raise ValueError(f"`task` must be one of {', '.join(map(repr, prompts))}, got {task!r}.")
        return prompts[task]


__all__ = ["MelLLMContinuationGenerationMixin"]
