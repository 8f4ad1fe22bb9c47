"""From a recipe's tensors to methods: the class that it names, and an instance for the parameters of each tensor."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import RecipeError, suggestion
from .methods import METHODS, Method, find_method
from .recipe_file import RecipeFile
from .recipe_tensors import RecipeInput, RecipeTensor
from .untrusted import brief


def find_recipe_method(recipe: RecipeFile) -> type[Method]:
    """Return the class of the method that a recipe names; raises RecipeError with its line if there is none."""
    try:
        return find_method(recipe.merge_method)
    except RecipeError as error:
        got = brief(recipe.merge_method) if error.where == "method" else error.got
        hint = error.hint or suggestion(recipe.merge_method, METHODS)
        where = recipe.where_of("merge_method")
        raise RecipeError(error.what, where=where, got=got, expected=error.expected, hint=hint) from error


class MethodMaker:
    """Methods for the tensors of a recipe: equal parameters give one and the same instance."""

    def __init__(self, recipe: RecipeFile, method: type[Method]) -> None:
        self._recipe = recipe
        self._method = method
        self._fields = {name: spec.field for name, spec in method.specs().items()}
        self._made: dict[tuple[object, ...], Method] = {}

    @property
    def made(self) -> tuple[Method, ...]:
        """Return every method that was made."""
        return tuple(self._made.values())

    def method_of(self, tensor: RecipeTensor, models: Sequence[RecipeInput]) -> Method:
        """Return the method with a tensor's parameters.

        Args:
            tensor: the tensor.
            models: those of its inputs that are combined, in order. Their own values become one value if they agree,
                else one each.

        Raises:
            RecipeError: values that each may be do not go together, or the method does not take as many models.
        """
        values: dict[str, object] = {self._fields[name]: value for name, value in tensor.parameters.items()}
        for name in models[0].parameters:
            own = tuple(each.parameters[name] for each in models)
            values[self._fields[name]] = own[:1] if len(set(own)) == 1 else own
        key = (len(models), *values.items())
        if key not in self._made:
            try:
                method = self._method(**values)
                method.check_num_models(len(models))
            except RecipeError as error:
                raise RecipeError(
                    error.what,
                    where=f"{self._recipe.where_of('merge_method')}, tensor {brief(tensor.name)}: {error.where}",
                    got=error.got,
                    expected=error.expected,
                    hint=error.hint,
                ) from error
            self._made[key] = method
        return self._made[key]
