"""What `VIPosterior` promises, row by row, and the tests that hold it: the source of docs/contract.md."""

from dataclasses import dataclass

__all__ = ["PENDING", "SECTIONS", "Row"]


@dataclass(frozen=True)
class Row:
    """One promise.

    Attributes:
        item: what it is about.
        says: what holds, in a line.
        tests: those that fail if it does not, as paths below tests/.
    """

    item: str
    says: str
    tests: tuple[str, ...]


def of(file: str, *names: str) -> tuple[str, ...]:
    """The tests `names` of `file`."""
    return tuple(f"{file}.py::{name}" for name in names)


def options(*names: str) -> tuple[str, ...]:
    return of("test_contract_options", *names)


def amortised(*names: str) -> tuple[str, ...]:
    return of("test_contract_amortized", *names)


def posterior(*names: str) -> tuple[str, ...]:
    return of("test_posterior", *names)


def both(*names: str) -> tuple[str, ...]:
    return of("test_both_modes", *names)


def numbered(*names: str) -> tuple[str, ...]:
    return of("test_regressions", *names)


def peers(*names: str) -> tuple[str, ...]:
    return of("peers/test_sbi", *names)


def tools(*names: str) -> tuple[str, ...]:
    return of("peers/test_sbi_tools", *names)


PENDING: frozenset[str] = frozenset()
"""Tests that are named here and not yet written."""

CONSTRUCTION = (
    Row(
        "signatures",
        "Names, order and defaults of all arguments are the published ones; each keyword is shown to act.",
        posterior("test_signature_is_the_published_one", "test_published_properties")
        + options("test_every_keyword_is_shown")
        + amortised("test_every_keyword_is_shown", "test_every_published_method_is_walked"),
    ),
    Row(
        "`potential_fn`",
        "An object with the methods of a potential, or a callable of theta and x; all else is refused.",
        options("test_potential_and_prior")
        + posterior(
            "test_potential_and_prior",
            "test_the_observation_of_the_potential_is_the_default",
            "test_a_callable_may_have_its_observation_inside",
            "test_what_a_potential_returns",
        )
        + of("potentials/test_other_potentials", "TestDoor")
        + peers("test_wrapped_callable", "test_learned_potential"),
    ),
    Row(
        "`prior`",
        "Given, or the potential's, or that of a posterior given as q; with none, an error names it.",
        options("test_where_a_prior_comes_from", "test_potential_and_prior")
        + posterior(
            "test_potential_and_prior", "test_a_prior_without_support_is_an_error_unless_there_is_a_transform"
        ),
    ),
    Row(
        "`q`",
        "A family's name, a Distribution, a posterior (copied) or a callable; an error lists them.",
        options("test_q", "test_parameters_and_modules", "test_parameters_leave_the_others_alone")
        + posterior(
            "test_an_unknown_family_lists_the_known_ones",
            "test_parameters_are_not_dropped_for_a_q_that_brings_its_own",
            "test_a_posterior_of_another_length_is_no_start",
        )
        + numbered(
            "test_regression_06_a_warm_start_is_a_copy", "test_regression_08_every_family_in_every_dimension"
        )
        + amortised("test_an_amortised_posterior_lends_no_start"),
    ),
    Row(
        "`theta_transform`",
        "Leads from the support to unconstrained theta; its inverse carries q back; None: by the prior.",
        options("test_theta_transform")
        + numbered("test_regression_more_a_theta_transform_is_used")
        + of("priors/test_coordinates_choice", "test_a_map_of_ones_own_is_used")
        + of("priors/test_coordinates_map", "test_theta_comes_back", "test_log_jacobian_is_that_of_autograd"),
    ),
    Row(
        "`vi_method`",
        "Four names, four objectives with pairwise different gradients; another name lists them.",
        options("test_vi_method", "test_vi_method_beside_a_posterior_as_q")
        + posterior(
            "test_the_four_methods_give_four_gradients",
            "test_every_method_finds_the_known_posterior",
            "test_an_unknown_method_lists_the_known_ones",
        )
        + of("objectives/test_objective_limits", "test_pairwise_different_gradients")
        + of(
            "objectives/test_objectives_by_quadrature",
            "test_reverse_kl",
            "test_forward_kl",
            "test_importance_weighted",
            "test_renyi_with_few_particles",
        ),
    ),
    Row(
        "`device`, `to`",
        "Potential, prior, link, q, cached x and MAP and the optimiser's state move; an index is kept.",
        options("test_device")
        + both(
            "test_everything_moves",
            "test_an_index_of_a_device_is_kept",
            "test_fitted_on_a_gpu_and_moved_back",
        )
        + posterior("test_everything_moves", "test_a_device_keeps_its_index", "test_a_fit_goes_on_elsewhere"),
    ),
    Row(
        "`x_shape`",
        "Warns that it is deprecated and changes nothing.",
        options("test_x_shape") + posterior("test_x_shape_is_deprecated_and_ignored"),
    ),
    Row(
        "`num_transforms`, `hidden_features`, `z_score_theta`, `z_score_x`",
        "Sizes of flows and standardisation act in both modes (z_score_x where q sees x: in amortised fits).",
        options("test_sizes_of_flows", "test_z_score_theta", "test_z_score_x")
        + posterior("test_sizes", "test_z_scores")
        + amortised("test_what_is_built")
        + of("families/test_conditional", "test_x_is_standardised"),
    ),
    Row(
        "`params`, `VIPosteriorParameters`",
        "A frozen value of the constructor's options, below explicit arguments and above the instance.",
        amortised(
            "test_params_stand_between_arguments_and_instance",
            "test_the_parameters_are_frozen_and_have_the_constructors_defaults",
            "test_every_entry_of_the_parameters_is_shown",
            "test_a_divergence_that_an_amortised_fit_does_not_use_is_said_aloud",
        )
        + of("fitting/test_amortized", "test_precedence_of_choices"),
    ),
    Row(
        "`ZukoFlowType`",
        "Every member and its string, in any case, build the same q.",
        amortised("test_every_flow_type_by_member_and_by_string"),
    ),
)

SINGLE = (
    Row(
        "`train`",
        "Every keyword acts on the first call and later; an unknown one names the nearest; returns self.",
        options(
            "test_x",
            "test_n_particles",
            "test_learning_rate",
            "test_gamma",
            "test_max_num_iters",
            "test_clip_value",
            "test_show_progress_bar",
            "test_retain_graph",
            "test_optimizer",
            "test_scheduler",
            "test_alpha",
            "test_k",
            "test_estimators",
            "test_weight_transform",
            "test_init",
            "test_seed",
        )
        + posterior(
            "test_an_unknown_keyword_of_train_names_the_nearest",
            "test_train_returns_the_posterior_and_keeps_why_it_stopped",
            "test_the_known_posterior_is_found",
        ),
    ),
    Row(
        "errors of `train`",
        "Values out of range, an x that is missing or not finite: an error before anything has changed.",
        posterior(
            "test_values_out_of_range", "test_x_must_be_finite", "test_x_must_be_a_tensor", "test_a_missing_x"
        ),
    ),
    Row(
        "`warm_up_rounds`",
        "A first fit starts at the prior.",
        options("test_warm_up_rounds", "test_warm_up_belongs_to_a_first_fit")
        + posterior("test_q_starts_as_the_prior")
        + of("fitting/test_warm_up", "test_every_family_comes_to_the_prior"),
    ),
    Row(
        "`check_for_convergence`, `min_num_iters`, `eps`",
        "When to stop is decided by a rule, and the reason is kept and shown.",
        options("test_min_num_iters_and_check_for_convergence", "test_eps")
        + posterior("test_train_returns_the_posterior_and_keeps_why_it_stopped")
        + of(
            "fitting/test_gradient_loop",
            "test_a_loss_that_stays_ends_the_fit_after_four_windows",
            "test_a_gain_must_exceed_eps",
        ),
    ),
    Row(
        "`retrain_from_scratch`, `reset_optimizer`",
        "Fresh weights, or those an object of the user's began with, else an error; a fresh optimiser.",
        options("test_retrain_from_scratch", "test_reset_optimizer")
        + of("test_copies", "test_a_copy_can_start_afresh")
        + of(
            "families/test_own_families",
            "test_an_object_goes_back_to_its_snapshot",
            "test_callable_is_called_again_for_fresh_weights",
        )
        + posterior("test_a_family_that_cannot_be_rebuilt_says_so"),
    ),
    Row(
        "`quality_control`, `quality_control_metric`",
        "Three scores; a poor one warns with advice, once, and touches neither fit nor x nor options.",
        options("test_quality_control")
        + posterior(
            "test_a_bad_score_warns_with_what_to_do_and_nothing_else",
            "test_a_good_score_is_silent",
            "test_a_poor_prop_beside_a_good_report_does_not_reassure",
            "test_quality_control_never_raises_on_a_q_that_cannot_be_rebuilt",
        )
        + numbered("test_defect_06_quality_control_keeps_its_hands_off"),
    ),
    Row(
        "`sample`, `log_prob`",
        "Shapes; errors before training and for another x; -inf outside, never NaN; gradients on demand.",
        options("test_sample", "test_densities")
        + posterior(
            "test_before_train",
            "test_an_x_that_differs_in_any_entry_is_another_one",
            "test_a_new_default_x_is_another_one",
            "test_shapes_of_draws",
            "test_shapes_of_log_prob_and_potential",
            "test_outside_the_support",
            "test_sample_shapes",
            "test_theta_of_wrong_length",
        ),
    ),
    Row(
        "`sample_batched`",
        "Not for a fit to one observation: an error names the ways to many.",
        posterior("test_sample_batched_says_what_to_do_instead"),
    ),
    Row(
        "`evaluate`",
        "Prints one line with the score and returns the report.",
        options("test_evaluate")
        + posterior(
            "test_evaluate_psis",
            "test_evaluate_prop",
            "test_prop_and_prop_prior_look_at_different_places",
            "test_a_perfect_q",
            "test_options_of_evaluate",
        ),
    ),
    Row(
        "`potential`, `default_x`, `set_default_x`",
        "The potential at x; the default x can be set, which forgets the MAP and returns self.",
        options("test_densities", "test_set_default_x")
        + posterior("test_shapes_of_log_prob_and_potential", "test_published_properties"),
    ),
    Row(
        "`map`",
        "Every option acts; Ctrl-C keeps the best; kept until x changes; right on mixed priors and bounds.",
        options("test_sizes_of_map", "test_learning_rate_and_start_of_map", "test_other_options_of_map")
        + posterior("test_the_map_is_kept_until_x_changes", "test_options_of_map")
        + both(
            "test_map_of_a_mixed_prior_and_on_its_bounds",
            "test_map_in_a_corner_of_a_box",
            "test_ctrl_c_in_map_keeps_the_best_so_far",
        ),
    ),
    Row(
        "Ctrl-C in training",
        "Ends the fit and keeps it, in both modes.",
        both("test_ctrl_c_in_training_keeps_the_fit") + posterior("test_ctrl_c_ends_the_fit_and_keeps_it"),
    ),
)

AMORTISED = (
    Row(
        "`train_amortized`: keywords",
        "Every keyword acts on the first call and on later ones.",
        amortised(
            "test_theta_is_checked_and_not_learned_from",
            "test_x_is_what_q_learns_from",
            "test_sizes",
            "test_learning_rate",
            "test_gamma",
            "test_clip_value",
            "test_max_num_iters",
            "test_show_progress_bar",
            "test_seed",
            "test_retrain_from_scratch",
            "test_what_is_built",
            "test_embedding_net",
        ),
    ),
    Row(
        "`train_amortized`: stopping",
        "The loss on held-out observations ends the fit, and the weights with the lowest one are kept.",
        amortised("test_stop_after_iters")
        + of(
            "fitting/test_amortized",
            "test_held_out_x_are_not_trained_on_and_have_the_same_noise",
            "test_best_weights_are_kept",
            "test_stops_early_and_says_why",
        ),
    ),
    Row(
        "`train_amortized`: errors",
        "Unequal lengths, no data, NaN, values out of range, an unknown family, another D.",
        of(
            "test_amortized",
            "test_bad_simulations",
            "test_bad_keywords",
            "test_own_q_has_no_conditional_form",
            "test_potential_of_a_wrong_shape",
        )
        + of("fitting/test_amortized", "test_sizes_are_positive_whole_numbers", "test_bad_numbers"),
    ),
    Row(
        "accuracy",
        "Moments at observations that were not trained on are those of the exact posterior.",
        of("test_amortized", "test_close_to_the_exact_posterior_at_held_out_x")
        + both("test_an_amortised_fit_on_a_mixed_prior_is_right")
        + of("test_amortised_page", "test_an_image_s_posterior_by_quadrature"),
    ),
    Row(
        "bounded and mixed priors",
        "q lies within the support and is normalised there, for every family.",
        both("test_every_family_on_bounded_and_mixed_priors")
        + of("families/test_conditional", "test_lives_on_the_support", "test_draws_have_their_density"),
    ),
    Row(
        "embedding networks",
        "Images by convolutions, sets by a network blind to order; one image is one observation.",
        of("test_amortised_page", "test_images", "test_sets")
        + of("test_amortized", "test_images_and_embedding", "test_one_image_is_one_observation_everywhere"),
    ),
    Row(
        "`sample`, `sample_batched`",
        "(..., D) at one x, (..., batch, D) at many; no pass draws more than `max_sampling_batch_size`.",
        amortised("test_draws", "test_max_sampling_batch_size")
        + of("test_amortized", "test_shapes_of_samples", "test_batches_of_samples_are_no_larger_than_asked"),
    ),
    Row(
        "`log_prob`",
        "Row by row, one theta at many x, many theta at one x; other numbers of rows are an error.",
        amortised("test_log_prob") + of("test_amortized", "test_log_prob_broadcasts"),
    ),
    Row(
        "`map`, `evaluate`, `potential` at the default x",
        "As for one observation, and as they are asked.",
        amortised("test_map", "test_evaluate", "test_potential")
        + of("test_amortized", "test_map_evaluate_potential_and_report_at_the_default_x"),
    ),
    Row(
        "from one mode to the other",
        "Training in the other mode warns and replaces; the new fit is as if it had come first.",
        amortised("test_nothing_of_one_mode_is_left_in_the_other")
        + of(
            "test_amortized",
            "test_from_one_observation_to_amortised",
            "test_from_amortised_to_one_observation",
            "test_another_q_forgets_the_fit",
        ),
    ),
)

STATE = (
    Row(
        "copies",
        "pickle, torch.save, deepcopy of every q: equal draws, the original untouched, the copy trains on.",
        of(
            "test_copies",
            "test_a_copy_is_equal_and_independent",
            "test_a_copys_optimizer_holds_the_copys_weights",
            "test_all_else_comes_along",
            "test_priors_that_torch_copies_badly",
        )
        + of("test_amortized", "test_copies_draw_the_same_and_train_on_alone"),
    ),
    Row(
        "`save`, `load`",
        "Files without code, in both modes: equal draws and densities, trained on alike; old ones load.",
        of(
            "test_saving",
            "test_named_families",
            "test_all_state_comes_back",
            "test_loading_neither_unpickles_nor_imports",
            "test_files_of_format_1_say_what_they_said",
            "test_files_of_format_1_train_on",
        )
        + of(
            "test_saving_amortized",
            "test_every_family",
            "test_all_state_comes_back",
            "test_an_embedding_net_is_asked_for",
            "test_loading_neither_unpickles_nor_imports",
            "test_a_file_of_format_2_says_what_it_said",
        ),
    ),
    Row(
        "torch's settings",
        "The global `validate_args`, dtype and threads stay as they were.",
        both("test_torchs_settings_stay_as_they_are")
        + posterior("test_torchs_settings_are_left_alone")
        + of("test_house", "test_import_visbi_leaves_torch_settings_alone")
        + of("core/test_zuko_import", "test_validation_stays_as_the_user_set_it"),
    ),
    Row(
        "randomness",
        "torch's global generator alone, or a seed: then equal to the bit, and the generator untouched.",
        both("test_a_seed_repeats_a_fit_to_the_bit", "test_a_seeded_fit_leaves_the_global_generator")
        + posterior(
            "test_a_seed_repeats_the_fit_and_leaves_the_global_generator",
            "test_without_a_seed_the_global_generator_decides",
        ),
    ),
    Row(
        "precision",
        "Priors and observations in float32 and float64, in any combination; answers in the prior's.",
        both("test_every_precision") + posterior("test_draws_and_densities_are_in_the_priors_dtype"),
    ),
)

REGRESSIONS = (
    Row(
        "1",
        "`sample`, `log_prob`, `evaluate` before `train` say so.",
        numbered("test_regression_01_before_train"),
    ),
    Row("2", "sbi's `run_sbc` over many x refits each.", tools("test_regression_02_run_sbc")),
    Row("3", "Every q survives pickle and torch.save, and trains on.", numbered("test_regression_03_files")),
    Row(
        "4",
        "The optimiser of a deepcopy steps the copy.",
        numbered("test_regression_04_a_deepcopys_optimizer_steps_the_copy"),
    ),
    Row(
        "5",
        "Retraining with a bounded prior applies the link once.",
        numbered("test_regression_05_retraining_applies_the_link_once"),
    ),
    Row("6", "A warm start copies weights.", numbered("test_regression_06_a_warm_start_is_a_copy")),
    Row(
        "7", "What trains in a user's q is found, or an error.", numbered("test_regression_07_a_users_own_q")
    ),
    Row(
        "8",
        "Every family in 1, 2, 3 and 5 dimensions.",
        numbered("test_regression_08_every_family_in_every_dimension"),
    ),
    Row("9", "Mixed supports.", numbered("test_regression_09_mixed_supports")),
    Row("10", "A half-Cauchy prior stays finite.", numbered("test_regression_10_a_half_cauchy")),
    Row(
        "11",
        "A transform that does not return is left out, with a warning.",
        numbered("test_regression_11_a_transform_that_does_not_return"),
    ),
    Row(
        "12",
        "`map` for mixed priors and conditioned potentials.",
        numbered("test_regression_12_map_of_mixed_priors_and_conditioned_potentials"),
    ),
    Row(
        "13",
        "sbi's NPE without a prior, or with a late one: an error or a fit.",
        peers("test_regression_13_npe_without_prior") + posterior("test_potential_and_prior"),
    ),
    Row(
        "14",
        "Independent trials multiply, through sbi's NPE too.",
        numbered("test_regression_14_independent_trials_multiply") + peers("test_regression_14_iid_npe"),
    ),
    Row(
        "15",
        "A full-rank Gaussian draws and scores by the same triangle.",
        numbered("test_regression_15_gaussian_upper_triangle"),
    ),
    Row("16", "torch's validation stays on.", numbered("test_regression_16_torchs_validation_stays_on")),
    Row(
        "17",
        "Unknown keywords are never swallowed.",
        numbered("test_regression_17_unknown_keywords_are_not_swallowed"),
    ),
    Row("18", "Resampling weighs by p / q.", numbered("test_regression_18_resampling_weighs_by_p_over_q")),
    Row(
        "19",
        "Oversampling and batch sizes reach the sampler.",
        numbered(
            "test_regression_19_oversampling_reaches_the_resampling",
            "test_regression_19_the_batch_size_reaches_the_sampler",
        ),
    ),
    Row("20", "TARP in standardised coordinates flags a biased posterior.", tools("test_regression_20_tarp")),
    Row(
        "21",
        "A pickled transform keeps its inverse.",
        numbered("test_regression_21_a_pickled_transform_has_its_inverse"),
    ),
    Row("22", "`map_location`, indices of devices, complex priors.", numbered("test_regression_22_devices")),
    Row("23", "An x that is not finite is an error.", numbered("test_regression_23_an_x_that_is_not_finite")),
    Row("24", "One x has one shape everywhere.", numbered("test_regression_24_one_x_has_one_shape")),
    Row(
        "25",
        "Rounds do not pile up in memory; cycles do not recurse.",
        numbered("test_regression_25_rounds_do_not_pile_up", "test_regression_25_cycles_do_not_recurse"),
    ),
)

FURTHER = (
    Row(
        "seeds",
        "A seed may be a tensor, and seeds nothing else.",
        numbered("test_regression_more_seeds_may_be_tensors"),
    ),
    Row("float64", "Priors and x in double precision.", numbered("test_regression_more_double_precision")),
    Row(
        "ignored options",
        "An option that cannot act is an error or a warning.",
        numbered("test_regression_more_options_that_cannot_act_are_not_ignored"),
    ),
    Row("`theta_transform`", "Is used.", numbered("test_regression_more_a_theta_transform_is_used")),
    Row("device", "One for all that is returned.", numbered("test_regression_more_one_device_for_all")),
    Row(
        "diagnostics",
        "Of a potential that is nowhere finite: they end, with a message.",
        numbered("test_regression_more_a_diagnostic_of_nothing_ends"),
    ),
    Row("defaults", "Give an unbiased fit.", numbered("test_regression_more_the_defaults_are_not_biased")),
    Row(
        "best weights",
        "Are kept, and the end of a fit is explained.",
        numbered("test_regression_more_the_best_weights_are_kept_and_the_end_is_explained"),
    ),
)

DEFECTS = (
    Row("1", "IW is not rKL; K and DReG act.", numbered("test_defect_01_iw_is_not_rkl")),
    Row("2", "k-hat is not biased low.", numbered("test_defect_02_khat_not_biased_low")),
    Row("3", "Weights do not overflow.", numbered("test_defect_03_weights_do_not_overflow")),
    Row("4", "NPE and independent x: the product, whatever their number.", peers("test_defect_04_npe_iid")),
    Row("5", "`eps` counts on the first call.", numbered("test_defect_05_eps_counts_on_the_first_call")),
    Row(
        "6",
        "Quality control does not retrain, recurse or drop options.",
        numbered("test_defect_06_quality_control_keeps_its_hands_off"),
    ),
    Row(
        "7",
        "An amortised posterior is one still after sbi's `run_sbc`.",
        tools("test_defect_07_amortised_survives_run_sbc"),
    ),
    Row(
        "8",
        "Resampling nothing is an error, not a loop.",
        numbered("test_defect_08_resampling_nothing_is_an_error"),
    ),
    Row(
        "9",
        "`evaluate` and `train` return what they found.",
        numbered("test_defect_09_what_was_found_is_returned"),
    ),
    Row(
        "10",
        "Amortised fits embed, take x of more axes, and can be evaluated.",
        numbered("test_defect_10_networks_that_embed_and_x_of_more_axes"),
    ),
    Row(
        "11",
        "A seeded fit depends on nothing before it.",
        numbered("test_defect_11_a_seeded_fit_depends_on_nothing_before_it"),
    ),
    Row(
        "12",
        "A loss that is not finite costs a step, not the fit.",
        numbered("test_defect_12_a_loss_that_is_not_finite_costs_one_step"),
    ),
)

SECTIONS = {
    "Construction": CONSTRUCTION,
    "Fits to one observation": SINGLE,
    "Amortised fits": AMORTISED,
    "State": STATE,
    "Numbered cases that broke users of existing tools": REGRESSIONS,
    "Further cases": FURTHER,
    "Defects found by reading sbi 0.27": DEFECTS,
}
"""All rows, as the page shows them."""
