"""The learner inside other frameworks; each module needs a package of its own that is not installed along."""
