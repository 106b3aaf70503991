// Whether a candidate overlaps a kept box of its group by more than the threshold.

inline float min_of(float a, float b) { return a < b ? a : b; }
inline float max_of(float a, float b) { return a > b ? a : b; }

// Side of the box that two boxes share; what is not a number on one side only the volume of that box will tell.
inline float shared_side(float low, float high, float other_low, float other_high) {
  const float side = MRCNN3D_SUB(min_of(high, other_high), max_of(low, other_low));
  return side < 0.f ? 0.f : side;
}

// Among the kept boxes [first, stop), whole groups of LANES, so that the inner loop becomes a few wide instructions.
template <bool GROUPED>
bool hits_any(const KeptBoxes& kept, int64_t first, int64_t stop, Candidate one, float threshold) {
  float* const* const at = kept.corners;
  for (int64_t group = first; group < stop; group += LANES) {
    int any = 0;
    for (int64_t k = group; k < group + LANES; ++k) {
      const float z = shared_side(one.corners[0], one.corners[3], at[0][k], at[3][k]);
      const float y = shared_side(one.corners[1], one.corners[4], at[1][k], at[4][k]);
      const float x = shared_side(one.corners[2], one.corners[5], at[2][k], at[5][k]);
      int hit = mrcnn3d::overlaps_by_more(z, y, x, kept.volume[k], one.volume, threshold);
      if (GROUPED) hit &= (kept.group_low[k] == one.group_low) & (kept.group_high[k] == one.group_high);
      any |= hit;
    }
    if (any) return true;
  }
  return false;
}

bool hits_kept(const KeptBoxes& kept, int64_t first, int64_t stop, const Candidate& candidate, float threshold) {
  return kept.group_low ? hits_any<true>(kept, first, stop, candidate, threshold)
                        : hits_any<false>(kept, first, stop, candidate, threshold);
}
