# What librdkafka 2.12's CMake build forgets to find out, and its other build does not: the compiler has atomic builtins.
# Without them `rd_atomic32_set` returns the new value for the old one, so that a client never sees that all its
# brokers are down and never goes back to its bootstrap servers: after a broker's restart it may wait for ever.
# (librdkafka issue 5282, fixed in 2.15; `query_log::kafka` has a test.)
add_compile_definitions(HAVE_ATOMICS_32_ATOMIC=1 HAVE_ATOMICS_64_ATOMIC=1)
