#pragma once
#include "shape.h"

// A box is a shape with three sides.
namespace lab {

class Box : public Shape {
 public:
  explicit Box(double side) : side_(side) {}
  double volume() const { return side_ * side_ * side_; }

 private:
  double side_;
};

using Boxes = std::vector<Box>;

inline double total(const Boxes& boxes) {
  double sum = 0;
  for (const Box& box : boxes) sum += box.volume();
  return sum;
}

}  // namespace lab
